"""Studies: manifests, converters, images, and the loader, the only place that calls the processor."""
