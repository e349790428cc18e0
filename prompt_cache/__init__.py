"""Which text is reusable, and at which positions."""
