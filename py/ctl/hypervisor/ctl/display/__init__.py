"""How answers are shown: ``table`` (layout), ``cells`` (values), ``columns`` (which), ``documents`` (JSON, YAML)."""
