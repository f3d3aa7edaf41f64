"""The cluster port: certificates, TLS, one listener chosen by SNI and ALPN, its client side, forwarding."""
