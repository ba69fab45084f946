"""The deformable transformer: attention, encoder, decoder, two-stage and collaborative queries."""
