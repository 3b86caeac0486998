"""The leader's work: what is, compared with what should be. ``decide`` is pure, ``loop`` acts on the elected leader."""
