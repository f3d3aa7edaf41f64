"""What the service is made of below the API: seal, barrier, tokens, policies, mounts, response wrapping."""
