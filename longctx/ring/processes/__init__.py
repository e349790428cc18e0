"""The processes that carry a ring: how they find each other, are watched, and end."""
