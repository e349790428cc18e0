"""Work that no request waits for: queues, deadlines, ingestion, and where state is kept."""
