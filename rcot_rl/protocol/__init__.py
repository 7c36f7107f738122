"""The protocol with the policy: prompts, response parsing, keyframe selection, clips. No torch."""
