"""Running a job: the unit of work (`process_shard`), the executors that schedule it, and the ledger that proves it."""
