"""Wire types to domain values and back, for the edges of server and agent.

Imports core and the generated stubs, nothing else. Decoding is strict about shape (what is required must be there
and known) and silent about meaning: limits of user input are the business of the server's API.
"""
