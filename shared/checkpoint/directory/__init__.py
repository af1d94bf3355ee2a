"""The contract: manifest, publishing, opening, target, run directory, sharded publishing, auxiliary files."""
