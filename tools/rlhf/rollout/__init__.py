"""Roll-outs: replies sampled from a policy."""
