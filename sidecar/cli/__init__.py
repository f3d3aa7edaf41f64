"""The command line. Standard library only: a call must start fast and never load the server."""
