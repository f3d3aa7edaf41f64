"""The replicated store in Consul: physical stores, write-ahead log, merkle index, recovery, election."""
