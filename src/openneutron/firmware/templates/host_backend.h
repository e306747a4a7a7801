// The stand-in of the NPU on a host: LiteRT runs the TFLite models of the delegates.
#pragma once

// Registers the backend "NeutronBackend". Prints the reason if that fails.
bool start_host_backend();
