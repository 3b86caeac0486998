"""Images on the server: uploads, the store of their content, their records, and what nodes are told of them.

``contract.py``    what the API works on
``service.py``     the calls of ImageService
``uploads.py``     receiving content, over interruptions
``store.py``       the directory that holds it
``keeping.py``     keeps directory and records in step, and fetches what other servers have
``naming.py``      which images a specification names, and where a node finds them
"""
