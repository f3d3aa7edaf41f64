"""Secrets engines that come with the sidecar. They import ``plugin_api`` only, like any other plugin."""
