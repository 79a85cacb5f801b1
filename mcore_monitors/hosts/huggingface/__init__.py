"""All that knows Hugging Face models, and models built like them, found by their structure."""
