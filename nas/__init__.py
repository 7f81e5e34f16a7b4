"""einsum-nas: search over einsum-structured linear layers."""
