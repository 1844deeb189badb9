"""The story of one forward: from embeddings, through the stages, to outputs of the usual shape."""
