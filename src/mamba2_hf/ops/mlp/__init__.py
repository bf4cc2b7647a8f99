"""Feed-forward layers: their gated activation, and the step of a whole one, dense or of experts."""
