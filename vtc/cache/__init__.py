"""What a cache holds: the only rooms that touch a cache object, and layers of our own."""
