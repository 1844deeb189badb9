"""One file per model family; each tells vtc where that family keeps its parts."""
