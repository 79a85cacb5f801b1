"""All that knows DeepSpeed: gates, engine call sites, the JSON key."""
