"""The deformable transformer: attention, encoder, two-stage proposals, decoder, collaborative queries."""
