"""Model families whose linear layers are structured."""
