"""Model families, one module each: config.json to Architecture and back, tensor names, named sizes."""
