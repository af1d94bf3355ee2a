"""The contract (docs/contract.md): manifest, publishing, opening, target, run directory, sharded publishing, auxiliary files."""
