"""The agent's gRPC API (AgentService): wire types in, domain values inside, wire types out."""
