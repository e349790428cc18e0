"""What works without a request: queues, deadlines, ingestion, and where state is stored."""
