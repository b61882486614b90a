"""The face of the engine towards a training program. It only composes."""
