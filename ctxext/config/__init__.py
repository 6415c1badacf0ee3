"""Floor 2: YAML into frozen specs, presets by name, the manifest beside every output. Imports no torch."""
