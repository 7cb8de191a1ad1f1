"""What a run tells while it goes on, as a stream of records, and who listens: files, metrics, traces, the dashboard."""
