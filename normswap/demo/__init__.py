"""The bundled model and its data: small enough to ship, with every pattern that matters."""
