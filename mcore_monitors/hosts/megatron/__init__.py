"""All that knows Megatron-core: layer specs, weight layouts, call sites, arguments."""
