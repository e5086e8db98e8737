"""A pre-trained sentence encoder that learns one text task after another."""
