"""Random networks, each held to one claim: the compacted network computes what the masked one does, or says why not."""
