"""The networks: autoencoder, encoder, quantiser, decoder, tokenizer, and what trains them."""
