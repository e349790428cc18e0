"""The processes that carry a ring: how they find each other, are monitored, and end."""
