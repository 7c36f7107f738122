"""The recipe: one YAML file, typed, composable by `extends`, overridable, hashable."""
