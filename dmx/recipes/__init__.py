"""Recipes: YAML files that hold only what differs from the defaults of `dmx.config`."""
