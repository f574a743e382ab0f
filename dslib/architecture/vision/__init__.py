"""The picture's side of fusion: an image stream, and the blocks by which a text model looks at it."""
