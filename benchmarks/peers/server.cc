// A gRPC server of the contract in C++, with the callback API, that plays the script of the benchmarks: a limit to compare with.
//
//     server-cpp --text TEXT --delay SECONDS

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>

#include "flywheel/v1/generation.grpc.pb.h"

namespace {

using flywheel::v1::GenerationDelta;
using flywheel::v1::GenerationRequest;
using flywheel::v1::GenerationResponse;
using flywheel::v1::GenerationService;
using std::chrono::system_clock;

// What every answer says over and over, 4 bytes a token, and the time before each token.
struct Script {
  std::string text;
  std::chrono::nanoseconds delay;

  std::string Token(int number) const { return text.substr(4 * number % text.size(), 4); }
};

// Writes a delta when it is due, and thinks of the next one when it has been written.
class DeltaWriter : public grpc::ServerWriteReactor<GenerationDelta> {
 public:
  DeltaWriter(const Script& script, int max_tokens) : script_(script), max_tokens_(max_tokens), due_(system_clock::now()) { Next(); }

  void OnWriteDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status(grpc::StatusCode::CANCELLED, "the caller has gone"));
    } else if (generated_ == max_tokens_) {
      Finish(grpc::Status::OK);
    } else {
      Next();
    }
  }

  void OnDone() override { delete this; }

 private:
  void Next() {
    if (script_.delay.count() == 0) {
      Write();
      return;
    }
    due_ += std::chrono::duration_cast<system_clock::duration>(script_.delay);
    alarm_.Set(due_, [this](bool) { Write(); });
  }

  void Write() {
    delta_.set_text(script_.Token(generated_++));
    delta_.set_generated_tokens(generated_);
    if (generated_ == max_tokens_) delta_.set_finish_reason("length");
    StartWrite(&delta_);
  }

  const Script& script_;
  const int max_tokens_;
  int generated_ = 0;
  system_clock::time_point due_;
  grpc::Alarm alarm_;
  GenerationDelta delta_;
};

class Service final : public GenerationService::CallbackService {
 public:
  explicit Service(Script script) : script_(std::move(script)) {}

  grpc::ServerWriteReactor<GenerationDelta>* GenerateDeltas(grpc::CallbackServerContext*, const GenerationRequest* request) override {
    return new DeltaWriter(script_, request->max_tokens());
  }

  // Answers at once: whole answers are measured without a delay.
  grpc::ServerUnaryReactor* GenerateAll(grpc::CallbackServerContext* context, const GenerationRequest* request,
                                        GenerationResponse* response) override {
    auto* sample = response->add_responses();
    for (int number = 0; number < request->max_tokens(); ++number) sample->mutable_text()->append(script_.Token(number));
    sample->set_generated_tokens(request->max_tokens());
    sample->set_finish_reason("length");
    response->set_num_samples(1);
    response->set_prompt(request->text());
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  const Script script_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 5 || std::string(arguments[1]) != "--text" || std::string(arguments[3]) != "--delay") {
    std::cerr << "usage: " << arguments[0] << " --text TEXT --delay SECONDS\n";
    return 2;
  }
  const std::chrono::duration<double> delay(std::atof(arguments[4]));
  Service service({arguments[2], std::chrono::duration_cast<std::chrono::nanoseconds>(delay)});
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (!server) return 1;
  std::cout << "ready: 127.0.0.1:" << port << std::endl;
  server->Wait();
}
