"""From a decoded request to an answer: token, policies, routing, engines. Knows nothing of HTTP servers."""
