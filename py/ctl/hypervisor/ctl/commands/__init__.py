"""The commands, one module for each resource or group of verbs; ``app`` and the groups here name them lazily."""
