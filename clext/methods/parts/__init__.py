"""What methods are made of: heads, replay buffers, teachers, exemplars, a generator."""
