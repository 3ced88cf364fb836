"""How each primitive ties the channels of what goes in to those of what comes out."""
