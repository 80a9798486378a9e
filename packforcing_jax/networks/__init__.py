"""The networks and where their arrays lie: transformer, autoencoder, text encoder, compressor. They know no memory."""
