"""Floor 2: YAML into frozen specs, presets by name, the manifest of every output. Imports no torch."""
