"""The main job: a small transformer that is trained, killed in the middle of a save, and resumed on several meshes."""
