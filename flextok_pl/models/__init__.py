"""Networks (autoencoder, encoder, quantiser, decoder, tokenizer, prior) and their training objectives."""
