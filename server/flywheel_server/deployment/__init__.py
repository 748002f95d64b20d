"""The deployment on Modal: its settings and weights, and the code that runs in the containers of gateways and of the Model."""
